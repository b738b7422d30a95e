"""How corpora are read: files and data sets in, judged rows out. `softlabels.corpus` puts the parts together."""
