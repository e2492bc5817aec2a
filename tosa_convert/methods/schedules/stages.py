"""The schedule of EViT, IdleViT and MCTF-Fast (arXiv 2202.07800, 2310.05654, 2403.10030): the ratio ρ, then ρ², then
ρ³."""

from tosa_convert.methods.schedule import Schedule


class Stages(Schedule):
    """Over the last three quarters of the layers, a third of them each."""

    def layers(self, depth, first):
        return list(range(depth // 4 + 1, depth + 1))

    def ratios(self, ratio, count, acts):
        return [round(ratio ** (1 + 3 * index // count), 6) for index in range(count)]
