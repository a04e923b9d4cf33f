"""What every room may use: checks of input, files that are whole, settings without secrets, words.

redact            settings without tokens and passwords, for records and logs
files             files that are whole, kills included
signals           signals that ask a process to stop
extras            optional packages: importing one, whether one is there, which release
memory            how much there is and is left, in a container too
launcher          what torchrun tells each process
wording           words for numbers
errors            what an error came of
undoing           changes put back, whatever interrupts
inputs            checks of rows, scores and masks
transfers         copies between devices, many tensors in one
trees             plain values as JSON, exactly, and back
dataclass_view    what HfArgumentParser and tyro need to see in it
checked_settings  what makes, checks and assigns a configuration
setting_kinds     kinds of fields, with what converts and checks their values
former_settings   settings by the names of TRL's earlier releases
"""
