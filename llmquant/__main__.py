"""`python -m llmquant` is the command `llmquant`."""

from llmquant.cli.main import main

if __name__ == "__main__":
    main()
