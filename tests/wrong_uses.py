"""Wrong uses of the command line and of Python, each with the one sentence that it gets.

    python tests/wrong_uses.py    writes figures/bad_input/uses.json, which the page of wrong uses shows

A use of the command line must end with exit code 2 and one line on the error channel; one in Python must raise
`BadInput`. Every sentence says what was wrong, what was expected, and what to do.
"""
import ctypes
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: bars are no part of a sentence
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cap_nb.analysis import compare_methods
from cap_nb.jobs.tables import comparison_markdown
from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.errors import BadInput
from cap_nb.core.files import sealed, write_checked, write_tensors
from cap_nb.data.problems import TASKS, load_problems, load_text
from cap_nb.models.decoding import generate_greedy
from cap_nb.evaluation import accuracy, bootstrap_interval, held_out_losses, perplexity
from cap_nb.importance import importance_factors, plot_factors
from cap_nb.jobs.job import run_job
from cap_nb.jobs.planning import plan
from cap_nb.jobs.records import load_run
from cap_nb.jobs.settings import FineTuning, Job, changed
from cap_nb.methods.prune import prune
from cap_nb.models.lab import CHECKPOINT, lab_model, train_lab
from cap_nb.models.loading import load_model, save_model
from cap_nb.portable.fine_tuning import held_zeros, recover
from cap_nb.portable.format import export_folder
from cap_nb.scoring import HeadLosses, causal_scores, masked_head, rank_correlation, score_interval
from cap_nb.methods.resumed_scoring import load_losses, save_losses, score_heads
from fixtures import tiny_llama
from programs import as_nobody, called, cap, finished

RECORD = Path(__file__).resolve().parent.parent / "figures" / "bad_input" / "uses.json"
FEW = "--n 3 --k 1 --loss-n 2 --windows 0 --accuracy-tasks none --device cpu"
FEW_EXAMPLES = "--n 3 --k 1 --device cpu"
RUN, PRUNE, EVAL = f"run {FEW} --out PLACE/new", "prune --out PLACE/new", "eval --out PLACE/new"


@dataclass(frozen=True)
class Use:
    area: str  # What it is about
    does: str  # What the user did: a command, or Python as text
    outcome: object = None  # For Python: a function of the prepared folder


# ---- the command line: PLACE is a folder with everything that `prepared` makes ----
OPTION_FILES = {
    "anchor": "n: &a 3\nk: *a", "tag": "n: !!python/object/apply:os.system [id]", "deep": "[" * 1000, "twice": "n: 3\nn: 4", "empty_list": "n: []",
    "within": "n: {a: 1}", "several": "---\nn: 3\n---\nn: 4", "merge": "<<: {n: 3}", "list_for_name": "? [a, b]\n: 3", "number_for_name": "3: 3", "float": "n: 3.0",
    "date": "n: 2024-01-01", "nan": "sparsity: [.nan]", "many": f"n: {list(range(1, 1200))}", "no_text": 'data-dir: "\\ud800"\nmodel: nothing', "config": "config: other.yaml",
    "whole_list": "note: [a, b]", "nothing_in_it": "# n: 3", "device": "device: [cpu, meta]", "no_place": "store: ''"}
CRITERION = "from cap_nb.all import add_criterion\nadd_criterion({})\n"
PLUGIN_FILES = {
    "leaves": "import sys\nsys.exit(3)", "generator": "raise GeneratorExit", "recursion": "def f(): f()\nf()", "syntax": "def (", "no_function": CRITERION.format("'mine', 7"),
    "taken": CRITERION.format("'magnitude', lambda known: known.weight"), "no_need": CRITERION.format("'mine', lambda known: known.weight, ('luck',)"),
    "no_name": CRITERION.format("7, lambda known: known.weight"), "no_file": "from cap_nb.all import add_text\nadd_text('moby', 7)",
    "no_family": "from cap_nb.all import add_family\nadd_family('mine', 'x')", "device_for_file": "from cap_nb.all import add_task\nadd_task('sums', '/dev/zero', 'x')",
    "use_text": CRITERION.format("'mine', lambda known: 'x'"), "use_list": CRITERION.format("'mine', lambda known: [1]"),
    "use_booleans": CRITERION.format("'mine', lambda known: known.weight > 0"), "use_row": CRITERION.format("'mine', lambda known: known.weight[:1].abs()"),
    "use_nan": CRITERION.format("'mine', lambda known: known.weight * float('nan')"), "use_division": CRITERION.format("'mine', lambda known: 1 / 0")}
DEVICES = ["meta", "xpu", "hip", "vulkan", "mps", "cuda", "cuda:99", "tpu", "xla", "cpu:x", "cpu:7", "''", "auto:1"]
COMMANDS = {
    "devices": [f"{PRUNE} --method magnitude --device {name}" for name in DEVICES] + [f"{RUN} --device meta", f"{EVAL} --device vulkan"],
    "numbers": [f"{RUN} {options}" for options in (
        "--n 0", "--n -1", "--n 99999999", "--k 0", "--k 10", "--batch-tokens 0", "--evaluate-n 0", "--evaluate-n 9999999 --accuracy-tasks lab-arc", "--loss-n -1", "--choice-n -1", "--shots -1", "--shots 9999999 --accuracy-tasks lab-arc",
        "--loss-n 9999999", "--max-new-tokens 0", "--windows -1", "--window-tokens 1", "--text-tokens 1", "--text-share 1", "--text-share -0.1",
        "--text-share nan", "--text-share 0.01", "--seed 18446744073709551616", "--seed -9999999999999999999999",
        "--calibration-seed 99999999999999999999", "--max-new-tokens 99999999 --accuracy-tasks lab-arc",
        "--temperature 0.6", "--top-p 0.9", "--samples 4", "--samples 4 --temperature inf", "--samples 4 --temperature 1 --top-p 0", "--samples 0",
        "--sparsity -0.1", "--sparsity 1", "--sparsity 1.5", "--sparsity nan", "--sparsity inf", "--sparsity a-half", "--sparsity ''", "--sparsity 0.1,,0.2")],
    "n:m patterns": [f"{PRUNE} --method {method}" for method in (
        "cap@0:4", "cap@4:4", "cap@5:4", "cap@-1:4", "cap@a:b", "wanda@2:0", "wanda@1:99999999999999999999", "wanda@2:4:8", "sparsegpt@2:7",
        "wanda@2:4 --sparsity 0.2")],
    "names": [f"{RUN} {options}" for options in (
        "--methods nothing", "--methods cap.nothing", "--methods wanda@moon", "--methods wanda+nothing", "--methods wanda^nothing",
        "--methods wanda.mean_ablation", "--methods ''", "--methods +owl", "--methods ^swaps", "--methods cap..mean", "--methods wanda^swaps^swaps", "--methods wanda^block^update", "--methods dense^block",
        "--tasks gsm9k", "--tasks ''", "--tasks svamp", "--tasks lab-gsm8k --choice-n 3", "--accuracy-tasks gsm9k", "--text moby-dick", "--style shouting", "--aggregation mode", "--score-target luck",
        "--dtype int8", "--dtype float8", "--evaluate-on training", "--calibrate-on PLACE/nothing", "--calibrate-on text --text-share 0.5",
        "--model nothing", "--model owner/name/too/deep", "--model ''", "--model PLACE", "--key-value mean", "--n", "--n many")]
    + [f"{PRUNE} --method cap --scores PLACE/scores.safetensors --key-value median", f"{PRUNE} --method magnitude --ties some", "nothing", "run --nothing", f"{EVAL} --limit 3"],
    "model folders": [f"{PRUNE} --method magnitude --model PLACE/{name}" for name in (
        "no_config", "config_text", "config_list", "config_binary", "no_heads", "half_heads", "negative_layers", "unknown_class", "pickled", "cut_off",
        "not_safetensors", "index_outside", "index_list", "index_missing", "file.txt", "no_tokenizer", "adapter", "edited_note")]
    + [f"{command} --model PLACE/pictures" for command in (f"{PRUNE} --method magnitude", f"{PRUNE} --method magnitude --stream", RUN, "plan")]
    + [f"plan --model PLACE/{name}" for name in ("no_heads", "half_heads", "negative_layers", "huge_numbers", "text_numbers", "config_list", "nothing")]
    + [f"{PRUNE} --method magnitude --stream --model PLACE/{name}" for name in ("config_list", "config_text", "list_for_type", "edited_note")],
    "examples beyond a model's context": [f"score {FEW_EXAMPLES} --model PLACE/short --tasks lab-arc --out PLACE/new.safetensors",
        f"{RUN} --model PLACE/short --tasks lab-arc", f"{RUN} --model PLACE/short --tasks lab-arc --methods wanda",
        f"{EVAL} --model PLACE/short --accuracy-tasks lab-arc --evaluate-n 2 --loss-n 0 --windows 0", f"{EVAL} --model PLACE/short --accuracy-tasks none --tasks lab-arc --loss-n 2 --windows 0",
        *(f"{PRUNE} {FEW_EXAMPLES} --model PLACE/short --tasks lab-arc --method {method}" for method in ("wanda", "gradient", "relevance", "sparsegpt", "wanda+kl")),
        f"recover {FEW_EXAMPLES} --model PLACE/short_pruned --tasks lab-arc --out PLACE/new", f"shrink {FEW_EXAMPLES} --model PLACE/short --tasks lab-arc --out PLACE/new",
        "bench PLACE/model --prompt 100000 --backends torch"],
    "scores": [f"{PRUNE} --method cap --scores PLACE/{name}" for name in (
        "nothing", "folder", "file.txt", "plain.safetensors", "list_meta.safetensors", "short_intact.safetensors", "short_stratum.safetensors",
        "bools.safetensors", "wrong_heads.safetensors", "nan.safetensors", "k_zero.safetensors", "flipped.safetensors", "scores.safetensors")]
    + [f"{PRUNE} --method cap"],
    "streaming": [f"{PRUNE} --stream --model PLACE/model {options}" for options in (
        "--method wanda --dtype float32", "--method wanda --norms PLACE/nothing", "--method wanda --norms PLACE/file.txt", "--method wanda --norms PLACE/folder",
        "--method sparsegpt --device auto", "--method wanda^block --hessians PLACE/folder", "--method sparsegpt --hessians PLACE/nothing", "--method sparsegpt --hessians PLACE/folder", "--method wanda+owl",
        "--method magnitude --hessians PLACE/folder", "--method magnitude --norms PLACE/file.txt")]
    + [f"{PRUNE} --stream --method magnitude", f"{PRUNE} --stream --model PLACE/folder --method magnitude", f"{PRUNE} --method wanda --norms PLACE/file.txt"],
    "outputs": ["prune --method magnitude --out PLACE/folder", "prune --method magnitude --out PLACE/file.txt", "prune --method magnitude --out PLACE/dangling",
                f"prune --method magnitude --out PLACE/{'n' * 300}", "prune --method magnitude --out /proc/nowhere/new", "prune --method magnitude --out PLACE/file.txt/new",
                f"run {FEW} --out PLACE/folder", f"run {FEW} --out PLACE/file.txt", f"run {FEW} --out PLACE/{'n' * 300}", "score --out PLACE/folder --n 3 --k 1",
                f"score --n 3 --k 1 --out PLACE/{'n' * 300}", "prune --method magnitude",
                "prune --method magnitude --out ''", f"run {FEW} --out ''", "score --n 3 --k 1 --out ''", "table ''"],
    "folders of others": ["prune --method magnitude --out PLACE/locked/new", "prune --method magnitude --out PLACE/new", f"run {FEW} --out PLACE/locked/new",
                          "score --n 3 --k 1 --out PLACE/locked/new.safetensors", "table PLACE/locked", "table PLACE/locked/run", f"run {FEW} --config PLACE/locked/x.yaml --out PLACE/new",
                          "prune --method magnitude --model PLACE/locked/model --out PLACE/open/new", f"run {FEW} --tasks gsm8k --data-dir PLACE/locked --out PLACE/new",
                          "prune --method cap --scores PLACE/locked/scores.safetensors --out PLACE/open/new"],
    "read-only disks": ["prune --method magnitude --out PLACE/disk/new", f"run {FEW} --out PLACE/disk/new", "score --n 3 --k 1 --out PLACE/disk/new.safetensors",
                        "eval --windows 0 --loss-n 2 --accuracy-tasks none --out PLACE/disk/new", "train-lab --steps 1 --out PLACE/disk/new",
                        f"chains {FEW_EXAMPLES.replace('--k 1 ', '')} --max-new-tokens 4 --out PLACE/disk/new.jsonl"],
    "finished runs": [f"{command} PLACE/{name}" for command in ("table", "figures", "pack", "ledger") for name in ("nothing", "folder", "file.txt")]
    + ["unpack PLACE/folder PLACE/new", "unpack PLACE/nothing PLACE/new", "table PLACE/edited_run", "table PLACE/old_run", "table PLACE/list_run"],
    "small files": ["export PLACE/nothing --format bitmask --out PLACE/new", "export PLACE/folder --format bitmask --out PLACE/new",
                    "export PLACE/model --format zip --out PLACE/new", "export PLACE/model --format delta --out PLACE/new",
                    "export PLACE/model --format bitmask --base lab --out PLACE/new", "restore PLACE/folder --out PLACE/new", "restore PLACE/model --out PLACE/new",
                    "export PLACE/model --format bitmask --out PLACE/model/inside"],
    "taking it home": [f"recover {FEW_EXAMPLES} --out PLACE/new {options}" for options in (
        "", "--steps 0", "--lr 0", "--lr nan", "--rank 0", "--warmup 2", "--examples 0", "--weight-decay -1", "--model PLACE/nothing")]
    + [f"shrink {FEW_EXAMPLES} --out PLACE/new {options}" for options in (
        "--sparsity 1", "--sparsity nan", "--groups 0", "--groups 99", "--neurons-by luck", "--scores PLACE/nothing --groups 1", "--model PLACE/nothing")]
    + [f"recover {FEW_EXAMPLES} --out PLACE/new {options}" for options in ("--lr 1e300", "--examples 1000000000000", "--warmup nan", "--teacher PLACE/nothing")]
    + ["bench PLACE/model --prompt 1000000000000", "bench PLACE/model --batches 1,,1", "gguf PLACE/nothing --out PLACE/new.gguf", "gguf PLACE/folder --out PLACE/new.gguf", "gguf PLACE/model --out PLACE/new.gguf --dtype q2",
       "gguf PLACE/model --out PLACE/new.bin", "bench PLACE/nothing", "bench PLACE/folder", "bench PLACE/model --rounds 0", "bench PLACE/model --batches 0",
       "bench PLACE/model --backends magic", "bench PLACE/model --device tpu", "bench PLACE/model --against PLACE/nothing", "card PLACE/nothing", "card PLACE/folder",
       "card PLACE/model --run PLACE/folder", "card PLACE/model --base no/such/id", "publish PLACE/model owner/name --dry-run", "publish PLACE/folder owner/name --dry-run",
       "publish PLACE/nothing owner/name --dry-run", "publish PLACE/model a/b/c --dry-run"],
    "comparing and repeating": ["compare PLACE/nothing PLACE/folder", "compare PLACE/folder", "compare PLACE/edited_run PLACE/old_run", "compare PLACE/nothing --sparsity lots",
                                "compare PLACE/nothing --format pdf", "compare PLACE/nothing --out PLACE/folder", "repeat PLACE/nothing --out PLACE/new",
                                "repeat PLACE/folder --out PLACE/new", "repeat PLACE/edited_run --out PLACE/new", "repeat PLACE/nothing --sparsity 2 --out PLACE/new"],
    "files of options": [f"run --config PLACE/{name} --out PLACE/new" for name in (
        "nothing.yaml", "folder", "list_meta.safetensors", "file.txt", *(f"{name}.yaml" for name in OPTION_FILES))]
    + [f"run --config PLACE/float.yaml {option} --out PLACE/new" for option in ("--save-models", "--quick")],
    "scoring in part": [f"score {FEW_EXAMPLES} --out PLACE/new.safetensors {options}" for options in (
        "--budget 0", "--budget nan", "--budget 1.5", "--budget 0.01", "--budget 0.5 --join", "--join", "--heads-at-once 0", "--budget 0.9 --heads-at-once -3",
        "--score-target divergence --budget 0.5", "--store PLACE/file.txt", "--calibrate-on /dev/zero")]
    + [f"{RUN} --budget 0.5 --methods cap --aggregation paper", f"{RUN} --budget 0.5 --methods wanda", f"hessians {FEW_EXAMPLES} --out PLACE/model", "prune --method magnitude --scores PLACE/nothing --out PLACE/new --stream"],
    "options that nothing reads": [f"{PRUNE} {options}" for options in (
        "--method cap.relevance --scores PLACE/nothing", "--method magnitude --stream --model PLACE/model --text-share 0.5", "--method wanda --scores PLACE/nothing", "--method cap.pooled --score-target divergence",
        "--method cap.relevance --stream --model PLACE/model", "--method wanda --ties all", "--method magnitude@row --ties all",
        "--method magnitude^update --ties all --stream --model PLACE/model --hessians PLACE/folder",
        "--method wanda^swaps --stream --model PLACE/model --hessians PLACE/folder --norms PLACE/file.txt",
        "--method wanda --text-tokens 64", "--method wanda --key-value max", "--method wanda --aggregation paired", "--recipe best-mask --chain-rule right,solved=0.25-0.75", "--recipe best-mask --key-value max",
        "--recipe one-shot --method magnitude", "--recipe one-shot --method cap", "--method magnitude --stream --model PLACE/model --n 64",
        "--method magnitude --text-share 0.25", "--method magnitude --batch-tokens 64", "--method magnitude --seed 7", "--method cap --scores PLACE/scores.safetensors --tasks lab-gsm8k")]
    + [f"{EVAL} --device cpu --window-tokens 513"] + [f"{EVAL} --harness cap_lab_gsm8k {options}" for options in ("--shots 8", "--scores PLACE/nothing", "--windows 3")]
    + [f"{EVAL} --harness none", f"{EVAL} --harness gsm8k --max-new-tokens 9", "claims --variants none --out PLACE/new", "claims --tasks lab-arc --n 8 --out PLACE/new",
       f"{EVAL} --device cpu --accuracy-tasks none --max-new-tokens 64", f"{EVAL} --device cpu --accuracy-tasks none --evaluate-n 50",
       f"{EVAL} --device cpu --windows 0 --text lab-text", f"{EVAL} --device cpu --windows 0 --window-tokens 64"]
    + [f"{RUN} {options}" for options in ("--methods wanda --score-target divergence", "--methods wanda --aggregation paired", "--max-new-tokens 64", "--shots 4", "--samples 4 --temperature 0.6", "--text-tokens 64")]
    + ["shrink --score-target divergence --out PLACE/new", "shrink --aggregation paired --out PLACE/new", "chains --tries 1 --chain-rule right,solved=0.25-0.75 --out PLACE/new.jsonl",
       "chains --tries 1 --temperature 1 --out PLACE/new.jsonl", "eval --spare gsm8k_fresh --accuracy-tasks lab-arc"],
    "planning": [f"plan --no-probe {options}" for options in (
        "--devices 0", "--devices 1000000000000", "--prompt-tokens 0", "--target-tokens -5", "--tries 0", "--budget 0", "--budget nan", "--n 100000000000",
        "--evaluate-n 1000000000000", "--accelerator ''", "--accelerator rtx", "--accelerator h100,link=nan", "--accelerator h100,peak=inf",
        "--accelerator h100,memory=1e300", "--accelerator h100,foo=1", "--accelerator h100,link", "--accelerator h100 --dtype float32", "--style ''",
        "--detect 0", "--detect 3 --discordant 0.01", "--discordant 0.2")],
    "chains and claims": [f"chains {FEW_EXAMPLES.replace('--k 1 ', '')} --max-new-tokens 4 --out PLACE/new.jsonl {options}" for options in (
        "--tries 0", "--temperature 0", "--temperature nan", "--tasks none", "--max-new-tokens 0")]
    + [f"claims {FEW} --out PLACE/new {options}" for options in ("--variants nothing", "--variants ''", "--base PLACE/nothing", "--text-windows 0")]
    + ["train-lab --steps 0 --out PLACE/new", "train-lab --steps 1 --seed -1 --out PLACE/new", "train-lab --steps 1 --out PLACE/folder",
       "eval --windows 0 --loss-n 0 --accuracy-tasks none --device cpu"]
    + [f"{command} --device cpu" for command in (
        "chains --out PLACE/new.jsonl --max-new-tokens 600", "chains --out PLACE/folder --n 1", "chains --out PLACE/new.jsonl --chain-rule right,long",
        "run --out PLACE/new --calibrate-on text --text-tokens 513", "score --out PLACE/new.safetensors --calibrate-on text --text-tokens 513",
        "run --out PLACE/new --calibrate-on text --n 1000 --text-tokens 500", "prune --out PLACE/new --method wanda --text-share 0.001",
        "run --out PLACE/new --n 4 --calibration-tokens 900", "run --out PLACE/new --calibration-tokens 9000000",
        "score --out PLACE/new.safetensors --chain-rule all",
        "run --out PLACE/new --budget 0.5 --aggregation mean --methods cap.neurons")] + ["fetch llama"],
    "plugins": [f"methods --plugin PLACE/{name}" for name in ("nothing.py", "file.txt", "folder", *(f"{name}.py" for name in PLUGIN_FILES if name[:3] != "use"))]
    + [f"{PRUNE} --method mine --plugin PLACE/{name}.py" for name in PLUGIN_FILES if name[:3] == "use"],
}


# ---- data files ----
def deep(levels):
    return "[" * levels + "]" * levels


ARC = {"question": {"stem": "Which?", "choices": [{"label": label, "text": label.lower()} for label in "ABCD"]}, "answerKey": "A"}


def arc(**changes):
    return json.dumps({"question": {"stem": "Which?", "choices": ARC["question"]["choices"], **changes}, "answerKey": "A"})


def hub_arc(labels, texts, key="A"):
    return json.dumps({"question": "Which?", "choices": {"label": labels, "text": texts}, "answerKey": key})


GSM8K_FILES = {
    "binary": b"\x00\xff\xfe\x01" * 20, "Latin-1": '{"question": "caf\xe9", "answer": "#### 1"}'.encode("latin-1"),
    "UTF-16": '{"question": "q", "answer": "a #### 1"}'.encode("utf-16"), "a lone surrogate": b'{"question": "\\ud800", "answer": "a #### 1"}',
    "a null question": b'{"question": null, "answer": "a #### 1"}', "a number for a question": b'{"question": 7, "answer": "a #### 1"}',
    "a list for an answer": b'{"question": "q", "answer": ["a #### 1"]}', "an empty question": b'{"question": " ", "answer": "a #### 1"}',
    "no final number": b'{"question": "q", "answer": "a"}', "a final word": b'{"question": "q", "answer": "a #### many"}',
    "no answer": b'{"question": "q"}', "nothing": b"", "blank lines only": b"\n\n\n", "no JSON": b"question, answer\n", "a list": b"[1, 2]\n", "a number": b"7\n",
    "nesting 200,000 deep": deep(200_000).encode(), "null": b"null\n", "a cut-off line": b'{"question": "q", "ans'}
STRATEGYQA_FILES = {
    "an object": b'{"question": "q"}', "records that are numbers": b"[1, 2]", "an answer in words": b'[{"question": "q", "answer": "yes", "facts": ["f"]}]',
    "null facts": b'[{"question": "q", "answer": true, "facts": null}]', "facts that are numbers": b'[{"question": "q", "answer": true, "facts": [1]}]',
    "a null question": b'[{"question": null, "answer": true, "facts": ["f"]}]', "an empty list": b"[]", "null": b"null",
    "nesting 200,000 deep": deep(200_000).encode(), "a surrogate in a fact": b'[{"question": "q", "answer": true, "facts": ["\\udc00"]}]'}
NINE = list("ABCDEFGHI")
ARC_FILES = {
    "nine choices": hub_arc(NINE, NINE), "nine choices in AI2's form": arc(choices=[{"label": x, "text": x} for x in NINE]), "no choices": hub_arc([], []),
    "one choice": hub_arc(["A"], ["a"]), "a null text": hub_arc(["A", "B"], ["a", None]), "a number for a text": hub_arc(["A", "B"], ["a", 2]),
    "more labels than texts": hub_arc(["A", "B", "C"], ["a", "b"]), "more texts than labels": hub_arc(["A", "B"], ["a", "b", "c"]),
    "an answer that is no choice": hub_arc(["A", "B"], ["a", "b"], "E"), "a label twice": hub_arc(["A", "A"], ["a", "b"]),
    "null choices": json.dumps({"question": "Which?", "choices": None, "answerKey": "A"}), "a null stem": arc(stem=None),
    "an empty text": hub_arc(["A", "B"], ["a", " "]), "a number for a key": hub_arc(["A", "B"], ["a", "b"], 1), "a surrogate in a choice": hub_arc(["A", "B"], ["a", "\ud83d"])}
SVAMP_FILES = {
    "an object": b'{"Body": "b", "Question": "q", "Answer": 1}', "an answer in words": b'[{"Body": "b", "Question": "q", "Answer": "two"}]',
    "no body": b'[{"Question": "q", "Answer": 1}]', "a null question": b'[{"Body": "b", "Question": null, "Answer": 1}]', "an empty list": b"[]"}
MATH_FILES = {
    "a null problem": b'{"problem": null, "solution": "s", "answer": "1"}', "no answer": b'{"problem": "p", "solution": "s"}',
    "an empty answer": b'{"problem": "p", "solution": "s", "answer": " "}', "a number for an answer": b'{"problem": "p", "solution": "s", "answer": 1}', "nothing": b""}
TEXT_FILES = {"binary": b"\x00\xff\xfe\x01" * 99, "Latin-1": "caf\xe9 ".encode("latin-1") * 99, "UTF-16": ("word " * 99).encode("utf-16"), "nothing": b"", "blank lines only": b" \n \n"}
FILES = {("gsm8k", "gsm8k/train.jsonl"): GSM8K_FILES, ("strategyqa", "strategyqa/train.json"): STRATEGYQA_FILES,
         ("arc", "arc/ARC-Challenge-Train.jsonl"): ARC_FILES, ("svamp", "svamp/SVAMP.json"): SVAMP_FILES, ("math500", "math500/test.jsonl"): MATH_FILES,
         ("wikitext2", "wikitext2/test.txt"): TEXT_FILES}


def reading(task, name, content):
    """Read a benchmark file with this content."""
    def read(place):
        path = place / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if task == "wikitext2":
            return load_text(task, place / "data")
        return load_problems(task, "calibration" if "calibration" in TASKS[task].files else "evaluation", place / "data")
    return read


# ---- Python ----
def tables(**changes):
    """A table of losses of the lab model's heads, with something wrong in it."""
    n = 6
    plain = {"masked": torch.rand(6, 6, n, dtype=torch.float64), "intact": torch.rand(n, dtype=torch.float64), "stratum": (0,) * n,
             "task": ("lab-arc",) * n, "uid": tuple("abcdef"), "k": 1, "seed": 0}
    return HeadLosses(**plain | changes)


def on_lab(action):
    """Do something with the lab model and its tokenizer."""
    return lambda place: action(*lab_model(), place)


def beyond(place, action):
    """Do something with a model of 16 positions and its tokenizer."""
    return action(*load_model(place / "short", device="cpu"))


def pictures():
    """A model of transformers that knows no language."""
    return ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4))


def few(tokenizer):
    return calibration_set(tokenizer, tasks=("lab-arc",), n=3, k=1)


PYTHON = {
    "prune(model, 'nothing', 0.5)": on_lab(lambda m, t, p: prune(m, "nothing", 0.5)),
    "prune(model, 'magnitude', True)": on_lab(lambda m, t, p: prune(m, "magnitude", True)),
    "prune(model, 'magnitude', nan)": on_lab(lambda m, t, p: prune(m, "magnitude", float("nan"))),
    "prune(model, 'cap', 0.5)": on_lab(lambda m, t, p: prune(m, "cap", 0.5)),
    "prune(model, 'wanda', 0.5)": on_lab(lambda m, t, p: prune(m, "wanda", 0.5)),
    "prune(model, 'cap', 0.5, factors=torch.ones(2, 2))": on_lab(lambda m, t, p: prune(m, "cap", 0.5, factors=torch.ones(2, 2))),
    "prune(model, 'cap', 0.5, factors=torch.full((6, 6), nan))": on_lab(lambda m, t, p: prune(m, "cap", 0.5, factors=torch.full((6, 6), float("nan")))),
    "prune(model, 'magnitude', 0.5, ties='some')": on_lab(lambda m, t, p: prune(m, "magnitude", 0.5, ties="some")),
    "prune(a model for pictures, 'magnitude', 0.5)": lambda p: prune(pictures(), "magnitude", 0.5),
    "prune(torch.nn.Linear(2, 2), 'magnitude', 0.5)": lambda p: prune(torch.nn.Linear(2, 2), "magnitude", 0.5),
    "importance_factors(torch.full((2, 2), nan))": lambda p: importance_factors(torch.full((2, 2), float("nan"))),
    "importance_factors(torch.rand(2, 2), low=3, high=1)": lambda p: importance_factors(torch.rand(2, 2), low=3.0, high=1.0),
    "causal_scores(losses, 'mode')": lambda p: causal_scores(tables(), "mode"),
    "causal_scores(losses, k=99)": lambda p: causal_scores(tables(), k=99),
    "calibration_set(tokenizer, tasks=())": on_lab(lambda m, t, p: calibration_set(t, tasks=())),
    "calibration_set(tokenizer, tasks=('nothing',))": on_lab(lambda m, t, p: calibration_set(t, tasks=("nothing",))),
    "calibration_set(tokenizer, n=10 ** 9)": on_lab(lambda m, t, p: calibration_set(t, tasks=("lab-arc",), n=10 ** 9)),
    "calibration_set(tokenizer, k=4, n=1)": on_lab(lambda m, t, p: calibration_set(t, tasks=("lab-arc",), k=4, n=1)),
    "Calibration.from_examples([])": lambda p: Calibration.from_examples([]),
    "accuracy(model, tokenizer, 'lab-arc', n=0)": on_lab(lambda m, t, p: accuracy(m, t, "lab-arc", n=0)),
    "perplexity(model, tokenizer, 'lab-text', windows=0)": on_lab(lambda m, t, p: perplexity(m, t, 'lab-text', windows=0)),
    "load_model('lab', dtype='int4')": lambda p: load_model("lab", dtype="int4"),
    "load_model('lab', device='meta')": lambda p: load_model("lab", device="meta"),
    "load_model(7)": lambda p: load_model(7),
    "load_problems('gsm8k', 'training')": lambda p: load_problems("gsm8k", "training"),
    "load_problems('gsm8k', 'evaluation', 'nowhere')": lambda p: load_problems("gsm8k", "evaluation", "nowhere"),
    "load_text('nothing')": lambda p: load_text("nothing"),
    "load_losses(a folder)": lambda p: load_losses(p / "folder"),
    "save_losses(losses, 'a\\0b')": lambda p: save_losses(tables(), "a\0b"),
    "save_losses(losses, a pipe)": lambda p: save_losses(tables(), p / "pipe"),
    "prune(model.to('meta'), 'magnitude', 0.5)": lambda p: prune(tiny_llama().to("meta"), "magnitude", 0.5),
    "score_interval(losses, draws=10 ** 30)": lambda p: score_interval(tables(), draws=10 ** 30),
    "score_interval(losses, confidence=95)": lambda p: score_interval(tables(), confidence=95),
    "bootstrap_interval([1.0, 2.0], seed=-1)": lambda p: bootstrap_interval([1.0, 2.0], seed=-1),
    "rank_correlation(torch.rand(2), torch.rand(3))": lambda p: rank_correlation(torch.rand(2), torch.rand(3)),
    "masked_head(model, 0, 99)": lambda p: masked_head(tiny_llama(), 0, 99),
    "masked_head(model, -1, 0)": lambda p: masked_head(tiny_llama(), -1, 0),
    "masked_head(torch.nn.Linear(2, 2), 0, 0)": lambda p: masked_head(torch.nn.Linear(2, 2), 0, 0),
    "calibration_set(7)": lambda p: calibration_set(7),
    "accuracy(model, tokenizer, 'lab-arc', n='3')": on_lab(lambda m, t, p: accuracy(m, t, "lab-arc", n="3")),
    "plot_factors({})": lambda p: plot_factors({}),
    "run_job(Job(model='lab'), 'new')": lambda p: run_job(Job(model="lab"), p / "new"),
    "score_heads(model, calibration), examples beyond the context": lambda p: beyond(p, lambda m, t: score_heads(m, few(t))),
    "held_out_losses(model, tokenizer, 'lab-arc', n=2), beyond the context": lambda p: beyond(p, lambda m, t: held_out_losses(m, t, "lab-arc", n=2)),
    "accuracy(model, tokenizer, 'lab-arc', n=True)": on_lab(lambda m, t, p: accuracy(m, t, "lab-arc", n=True)),
    "calibration_set(tokenizer, tasks={'lab-arc', 'lab-gsm8k'})": on_lab(lambda m, t, p: calibration_set(t, tasks={"lab-arc", "lab-gsm8k"})),
    "generate_greedy(model, tokenizer, [[]], 3)": on_lab(lambda m, t, p: generate_greedy(m, t, [[]], 3)),
    "recover(model, calibration, FineTuning(steps='3'))": on_lab(lambda m, t, p: recover(m, few(t), FineTuning(steps="3"))),
    "score_heads(model, calibration), an example's input_ids are text": on_lab(lambda m, t, p: score_heads(m, replace(few(t), examples=tuple(
        replace(example, input_ids="abc") for example in few(t).examples)))),
    "comparison_markdown({})": lambda p: comparison_markdown({}),
    "compare_methods(iter([1, 2]))": lambda p: compare_methods(iter([1, 2])),
    "load_run('n' * 300)": lambda p: load_run(p / ("n" * 300)),
    "export_folder(model, below a file)": lambda p: export_folder(p / "model", p / "file.txt" / "new"),
    "plan(changed(Job(), n=10 ** 11))": lambda p: plan(changed(Job(), n=10 ** 11)),
    "held_zeros(model), nothing pruned": on_lab(lambda m, t, p: held_zeros(m)),
    "score_heads(model, replace(calibration, examples=()))": on_lab(lambda m, t, p: score_heads(m, replace(few(t), examples=()))),
    "causal_scores(replace(losses, masked=torch.rand(2, 2)))": lambda p: causal_scores(replace(tables(), masked=torch.rand(2, 2))),
    "importance_factors(torch.rand(2, 2), low=numpy.array(3))": lambda p: importance_factors(torch.rand(2, 2), low=np.array(3)),
    "accuracy(a model for pictures, tokenizer, 'lab-arc', n=1)": on_lab(lambda m, t, p: accuracy(pictures(), t, "lab-arc", n=1)),
    "train_lab('new', steps=1, work='/proc/nowhere/new')": lambda p: train_lab(p / "new", steps=1, work="/proc/nowhere/new"),
}


def uses():
    """Every wrong use."""
    for area, commands in COMMANDS.items():
        yield from (Use(area, f"cap {command}") for command in commands)
    for (task, name), files in FILES.items():
        yield from (Use(f"files of {task}", f"{name}: {what}", reading(task, name, content)) for what, content in files.items())
    yield from (Use("Python", text, action) for text, action in PYTHON.items())


# ---- what the uses need ----
def model_folder(folder, **changes):
    """The lab model's folder with another configuration."""
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("SHA256SUMS.json", "training.json"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def prepared(place):
    """Make the files and folders that the uses name."""
    (place / "folder").mkdir(parents=True)
    (place / "folder" / "something").write_text("here already")
    (place / "file.txt").write_text("a text")
    os.mkfifo(place / "pipe")
    (place / "dangling").symlink_to(place / "nowhere" / "at" / "all")
    for name, text in OPTION_FILES.items():
        (place / f"{name}.yaml").write_text(text)
    for name, text in PLUGIN_FILES.items():
        (place / f"{name}.py").write_text(text)
    model_folder(place / "model")
    for path in model_folder(place / "no_tokenizer").glob("*token*"):
        path.unlink()
    note = {"version": "0", "method": "magnitude", "zeros": 3}
    for name, changes in {"list_for_type": {"model_type": ["llama"]}, "edited_note": {"cap_nb": sealed(note) | {"zeros": 4}},
                          "no_heads": {"num_attention_heads": 0}, "half_heads": {"num_attention_heads": 2.5}, "negative_layers": {"num_hidden_layers": -1},
                          "unknown_class": {"model_type": "no_such_model", "architectures": ["NoSuchModel"]},
                          "huge_numbers": {"hidden_size": 10 ** 30}, "text_numbers": {"hidden_size": "many"}}.items():
        model_folder(place / name, **changes)
    for name, text in {"config_text": "not JSON", "config_list": "[1, 2]", "config_binary": None}.items():
        (model_folder(place / name) / "config.json").write_bytes(b"\x00\xff" * 9 if text is None else text.encode())
    (model_folder(place / "no_config") / "config.json").unlink()
    (model_folder(place / "adapter") / "adapter_config.json").write_text("{}")
    weights = model_folder(place / "pickled") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    weights = model_folder(place / "cut_off") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (model_folder(place / "not_safetensors") / "model.safetensors").write_text("no tensors")
    for name, index in {"index_outside": {"weight_map": {"a": "../secret.safetensors"}}, "index_list": [1], "index_missing": {"weight_map": {"a": "gone.safetensors"}}}.items():
        folder = model_folder(place / name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pictures().save_pretrained(place / "pictures")
    short_models(place)
    prepared_scores(place)
    (place / "disk").mkdir()
    (place / "locked").mkdir(mode=0o700)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    for name, content in {"old_run": {"format": 1}, "list_run": [1]}.items():
        (place / name).mkdir()
        write_checked(place / name / "run.json", content)
    (place / "edited_run").mkdir()
    write_checked(place / "edited_run" / "run.json", {"format": 3, "methods": ["cap"], "sparsities": [0.2]})
    path = place / "edited_run" / "run.json"
    path.write_text(path.read_text().replace("0.2", "0.3"))


def short_models(place):
    """A model whose learned positions end at 16, and the same pruned."""
    _, tokenizer = lab_model()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1)).eval()
    for name in ("short", "short_pruned"):
        save_model(model, tokenizer, place / name)
        prune(model, "magnitude", 0.5)


def prepared_scores(place):
    """Tables of losses, most of them wrong."""
    wrong = {"short_intact": {"intact": torch.rand(5, dtype=torch.float64)}, "short_stratum": {"stratum": (0,) * 5}, "bools": {"masked": torch.ones(6, 6, 6) > 0},
             "wrong_heads": {"masked": torch.rand(2, 3, 6, dtype=torch.float64)}, "nan": {"intact": torch.full((6,), float("nan"), dtype=torch.float64)},
             "k_zero": {"k": 0}, "scores": {}, "flipped": {}}
    for name, changes in wrong.items():
        save_losses.__wrapped__(tables(**changes), place / f"{name}.safetensors")
    save_file({"masked": torch.rand(6, 6, 6)}, place / "plain.safetensors")
    write_tensors(place / "list_meta.safetensors", {"masked": torch.rand(6, 6, 6), "intact": torch.rand(6)}, [1, 2])
    path = place / "flipped.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:start + 40] + bytes([data[start + 40] ^ 1]) + data[start + 41:])


def read_only(place):
    """Go on where PLACE/disk is a disk that may only be read: in this process alone."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "no mounts of its own")
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "ro", "tmpfs", str(place / "disk")]):
        subprocess.run(["mount", *words], check=True, capture_output=True)


ELSEWHERE = {"folders of others": as_nobody, "read-only disks": read_only}  # Area -> what happens in a process before its uses


@functools.cache
def is_possible(area, place):
    return os.geteuid() == 0 and finished(lambda: ELSEWHERE[area](place)).returncode == 0


def can_be_tried(use, place):
    """Whether this user of this machine can make what a use needs."""
    return use.area not in ELSEWHERE or is_possible(use.area, place)


def answer(use, place):
    """The sentence and the exit code (none in Python) of one use; an exception that no user should see is raised."""
    if use.outcome is not None:
        try:
            use.outcome(place)
        except BadInput as error:
            return str(error), None
        raise AssertionError(f"{use.does} was accepted in silence")
    words = [word.strip("'").replace("PLACE", str(place)) for word in use.does.split()[1:]]
    if use.area in ELSEWHERE:
        done = finished(lambda: (ELSEWHERE[use.area](place), cap(*words)())[1])
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip(), done.returncode
    result = called(*words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, f"{use.does}: exit code {result.exit_code}: {result.output[-300:]}"
    return result.stderr.strip(), 2


def told(sentence, place):
    """A sentence without the name of this place."""
    said = sentence.removeprefix("cap: ").replace(str(place), "PLACE")
    return re.sub(r"/[0-9a-f]{16}-units", "/KEY-units", said)  # it follows from the model's settings, which each version of transformers has its own of


def in_our_words(sentence):
    """A sentence without what another machine or version may say otherwise: what stands in brackets, and keys made of content."""
    return re.sub(r"\(.*\)(?=:)|\([^()]*\)|\b[0-9a-f]{16}\b", "...", sentence)


def cleared(place):
    """Remove what a use may have begun, or a later one would meet it: its names."""
    left = [path for folder in (place, place / "open") for path in folder.glob("new*")]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in left]


def write_record(path=RECORD):
    """Try every use, and keep what it was told."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "place"
        prepared(place)
        os.chmod(folder, 0o755)
        os.environ["HF_HUB_OFFLINE"] = "1"
        shown = {}
        for use in uses():
            assert can_be_tried(use, place), f"{use.does} needs root, and mounts of its own"
            shown.setdefault(use.area, {})[use.does] = told(answer(use, place)[0], place)
            cleared(place)
    write_checked(path, shown)


if __name__ == "__main__":
    write_record()
