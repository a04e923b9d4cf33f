"""What is told about a run: statistics, tables, trackers, plots, model cards, uploads.

metrics     every statistic's unit and denominator
statistics  the dictionary of statistics of a step
tables      the table of texts beside the curves
jsonl       the record of a run, one line per step
tracking    JSONL always; TensorBoard, Weights & Biases by choice
progress    the bar of a run
run_log     the trackers of a run, and what they are given of a step
plotting    the curves as a picture
model_card  the README.md beside a saved policy
publishing  uploading the best policy of a run
"""
