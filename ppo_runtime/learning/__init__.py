"""From scored responses to new weights.

step_inputs  what step is given, checked and laid out
forward      log-probabilities and values at response tokens only
scoring      from the scores a user gives to those that are rewarded
advantages   an estimator's advantages and returns of a batch
refusals     scored batches that cannot be trained on, by sequence and token
experience   what is known of a batch before it is trained on
update       epochs x updates x minibatches
guards       updates that would do harm are left out
inspection   batches that could not be trained on, kept
controllers  the KL controllers as objects
optimisers   a user's optimiser and scheduler, checked
scheduling   a learning-rate scheduler's step, whole or not at all
sameness     what must be the same on every rank, as plain facts
"""
