"""`python -m gemma_deploy`: the same program as `gemma-deploy`."""

from gemma_deploy.cli.main import main

if __name__ == "__main__":
    main()
