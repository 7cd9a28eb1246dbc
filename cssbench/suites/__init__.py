"""Many runs from one file: what they are (`spec`), what they cost (`plan`, `estimate`), where they lie and how far they
are (`folder`), and how they are started (`launch`). See docs/suites.md."""
