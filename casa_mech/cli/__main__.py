"""`python -m casa_mech.cli`."""

from casa_mech.cli import main

main()
