"""Why the method works: the paper's analyses, each a function from a request to plain values, made to be broken off."""
