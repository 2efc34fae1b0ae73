"""Shapes: a procedural world of moving figures, its captions and its pictures. Nothing here is learned."""

HEIGHT, WIDTH, FPS = 64, 96, 16
