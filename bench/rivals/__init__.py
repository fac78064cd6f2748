"""One module for each trainer that is measured: `python -m bench.rivals.NAME SPEC.json OUT.json` trains the job that
SPEC describes and writes what happened to OUT. Only recorder.py is shared, and nothing here but tunery.py imports
Tunery, so that each runs in an environment of its own."""
