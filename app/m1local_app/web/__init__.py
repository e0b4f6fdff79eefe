"""The chat page: Gradio, on this machine only.

What it is: desk, tabs and answers (who talks to the one model, and when), forms and views (values
to settings, state to what is shown), page and handlers (the layout, and what happens on a click),
serving (the port, the policy, who may come). What it is not: imported before a page is wanted.
"""
