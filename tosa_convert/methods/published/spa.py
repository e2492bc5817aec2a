"""SPA, Select and Pack Attention (arXiv 2410.23608), on a plain ViT: a gate in each layer of its second half, as the
paper has it in the later stages of a Swin; learnt in fine-tuning with selection labels."""

from tosa_convert.methods.method import Method

METHOD = Method(score="gate", bypass="identity", schedule="later", losses={"selection": 0.01})
