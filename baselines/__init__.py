"""One file per continual method, written against `cssbench.api`, `.losses` and `.models` only."""
