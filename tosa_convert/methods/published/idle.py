"""IdleViT (arXiv 2310.05654): idle tokens may be selected again, and a token cut loss groups them."""

from tosa_convert.methods.method import Method

METHOD = Method(
    score="class_query", bypass="identity", schedule="stages", losses={"cut": 1.0}, score_before="class_attention"
)
