"""Stories of a simulated world, with questions and the facts that their answers follow from."""

HOPS = (1, 2, 3)  # facts that an answer may follow from
LEAST_SENTENCES = 4  # of a story
# A question of three facts needs a place that its thing came to once, rare in long stories.
MOST_SENTENCES_OF_THREE = 256
