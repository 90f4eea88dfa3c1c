"""The commands of the Makefile that draw, demonstrate and check style, and what they draw with."""
