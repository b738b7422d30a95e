"""What the trainers share: `train` (one student), `joint` (two together) and `multitask` (one encoder, many heads)."""
