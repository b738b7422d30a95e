"""Parts of a sweep: the space of trials, how it is searched, what trains a trial, and what runs many of them."""
