"""The stages of a recipe, which `softlabels.run` puts in order."""
