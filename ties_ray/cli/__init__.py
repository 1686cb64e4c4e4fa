"""The command line `ties-ray`: its commands, and their texts on the screen."""
