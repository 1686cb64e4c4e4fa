"""The command line `ties-ray`: commands, and the words on the screen."""
