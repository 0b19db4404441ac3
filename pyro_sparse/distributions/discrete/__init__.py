"""Finite outcomes, some of probability zero: projections of scores; and straight-through forms of stock families."""
