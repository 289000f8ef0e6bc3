"""`python -m tarflow_fast` is `tarflow-fast`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="tarflow-fast")
