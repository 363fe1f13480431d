"""`python -m tandem.cli`: the `tandem` command where its script is not on the PATH."""

from tandem.cli.main import main

main()
