"""SPA, Select and Pack Attention (arXiv 2410.23608), on a plain ViT: a gate in each layer of its second half, as the
paper has it in the later stages of a Swin; learnt in fine-tuning with selection labels.

Published: Swin-T on COCO, 47.1 AP against 46 with all tokens; 29.6 % of the tokens kept with selection labels."""

from tosa_convert.methods.method import Method

METHOD = Method(score="gate", bypass="identity", schedule="later", losses={"gates": 0.01})
