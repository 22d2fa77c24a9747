"""Figures, animations and sliders of the notebooks: ``from dgm_course.viz import plots, widgets``.

Nothing is loaded here; ``plots`` brings matplotlib, ``widgets`` brings ipywidgets.
"""
