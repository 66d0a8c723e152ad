"""What a run looks like. Figures are matplotlib's; nothing here is loaded before it is used."""
