"""A stack of transposed convolutions on the last layer's tokens, each to twice the resolution and fewer channels."""

from torch import nn

from tosa_convert.models.dense import Head

WIDTHS = (256, 128, 64)


class Light(Head):
    several = False

    def __init__(self, width, channels):
        super(Head, self).__init__()
        self.norm = nn.LayerNorm(width)
        layers, before = [], width
        for after in WIDTHS:
            layers += [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        self.stack = nn.Sequential(*layers, nn.Conv2d(before, channels, 1))

    def forward(self, maps):
        normed = self.norm(maps[-1].permute(0, 2, 3, 1))
        return self.stack(normed.permute(0, 3, 1, 2))
