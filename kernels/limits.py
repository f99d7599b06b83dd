"""Constants of the arithmetic, for both backends: no Triton here."""

LN_2 = 0.6931471805599453
LOG2_E = 1.4426950408889634
DEAD = -1e30  # a logit at or below this is -inf: torch.finfo(dtype).min is a common mask
LOG_FLOOR = -1e4  # stands for log 0, so that 0 · log 0 = 0 and differences stay finite
REST_FLOOR = 2.0**-24  # log-probabilities that sum to 1 leave this to the rest: a rounding of 1
ABSENT = 2**31 - 1  # the id of an entry that is not there: it sorts behind every other
MAX_EXPONENT = 80.0  # of e in fp32: ratios of probabilities stop there
MAX_POWER = 100.0  # of 2 in fp32: probabilities to a negative power stop there
