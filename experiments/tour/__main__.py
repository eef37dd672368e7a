"""The tour, as `python -m experiments.tour`."""

from experiments.tour.tour import app

app.run()
