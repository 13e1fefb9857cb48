"""Raw rows of the paper's tasks, and what becomes of them."""

import json

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
BOOLQ = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
RAW = {
    "nlu": (
        {"instruction": BOOLQ, "input": "", "output": "the correct answer is true", "answer": "true"},
        {"prompt": ALPACA.format(BOOLQ), "completion": "the correct answer is true"},
    ),
    "math": (
        {"question": "Two and two?", "answer": "It is <<2+2=4>>4, thousandfold.\n#### 4,000"},
        {
            "prompt": "Two and two?\nAnswer the above question. First think step by step and then answer the final "
            "number.\n",
            "completion": "It is <<2+2=4>>4, thousandfold.\nThe final answer is: 4,000",
        },
    ),
    "code": (
        {"instruction": "Sort the list.", "input": "[2, 1]", "output": "[1, 2]"},
        {
            "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
            "context. Write a response that appropriately completes the request.\n\n### Instruction:\nSort the list."
            "\n\n### Input:\n[2, 1]\n\n### Response:\n",
            "completion": "[1, 2]",
        },
    ),
    "safety": (
        {"instruction": "Say hello.", "input": None, "output": "Hello."},
        {"prompt": ALPACA.format("Say hello."), "completion": "Hello."},
    ),
}


def write(folder, name, rows):
    file = folder / name
    file.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)) + "\n")
    return str(file)
