"""Who may attend to whom: the algebra, the catalogue, and the summary by tiles."""
