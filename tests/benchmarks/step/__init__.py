"""Speed and memory of whole steps and of generation, ours beside a peer's, each in an environment of its own.

The peer is the classic PPOTrainer of TRL 0.11.4. Its environment cannot be ours (it needs transformers 4), so that it
is made apart, once, of about 2 GB:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 'accelerate<1.3' 'datasets<4' 'peft<0.14' \
        'numpy<2.3' rich
    python -m tests.benchmarks.step --model smollm2 --peer peer/bin/python

``smollm2`` is the directory that the README's `convert` writes. `--peer-model DIR` names a copy that the peer can read;
left out, one is made for the time of the run. Without `--peer` ours is measured alone, against the machine's limit.

Modules import each other relatively: TRL's wheel brings a package `tests` of its own, so that a worker runs as
`step.worker`, from this folder's parent.

workload  the rows that are trained on, the prompts that are continued and the trainer, the same for both sides
worker    one side, one workload, one process: seconds, peak memory, the rate of a matrix product
ours      the trainer of this repository, on a workload
peer      TRL's, on the same; imports nothing of this repository but the workload
parts     where a step of ours goes: timers around the library's own seams, from outside
flops     how much arithmetic a workload needs
older     a model directory of transformers 5 as transformers 4 reads it
table     medians, ratios and efficiency of many runs
sameness  whether both sides compute the same numbers, where the order of the rows is the same
"""
