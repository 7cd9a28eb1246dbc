"""Models: a backbone and one head per step. Everything here is public to plug-in authors."""
