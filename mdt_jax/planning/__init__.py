"""Plans for machines that are not at hand: does a run fit, and how fast may it be?"""
