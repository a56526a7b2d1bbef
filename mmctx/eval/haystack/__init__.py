"""Documents of the long-context suites: haystack, needles and a question, exact in their length in model tokens."""
