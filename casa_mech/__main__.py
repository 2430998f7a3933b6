"""`python -m casa_mech`: the `casa-mech` command."""

from casa_mech.cli import main

if __name__ == "__main__":
    main()
