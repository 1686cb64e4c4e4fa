"""`python -m ties_ray` is the command line."""

from ties_ray.cli.commands import main

if __name__ == "__main__":
    main()
