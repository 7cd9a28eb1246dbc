"""`cssbench` and `python -m cssbench`."""

from cssbench.cli import main

if __name__ == "__main__":
    main()
