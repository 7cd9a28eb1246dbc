"""A method for cssbench, in a package of its own."""
