"""Serve pipelines over HTTP by OpenAI's API of pictures.

A request becomes a job (`jobs`), whose rows wait in the queue of a model (`scheduler`). Rows of equal settings are drawn
together by a process of its own (`worker`), which is started again when it dies (`supervisor`); what goes through the pipe
between both is in `protocol`. `app` and `routes` speak HTTP; `run` binds the port and drains at the end.
"""
