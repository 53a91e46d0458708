"""`python -m amid_trl …` and `accelerate launch -m amid_trl …` are the command `amid-trl`."""

from amid_trl.cli import main


if __name__ == "__main__":
    raise SystemExit(main())
