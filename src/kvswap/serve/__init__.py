"""An OpenAI-compatible server on one model, whose conversations stay on disk.

Three layers, each with one kind of thread:

* The event loop (``app``, ``chat``, ``completions``, ``responses``) reads requests, checks them and writes answers. It
  never computes: what takes longer than a moment runs elsewhere.
* ``jobs`` is the queue between the two. A ``Job`` goes down, events come back up. Cancelling is a flag on the job.
* One worker thread (``answers``) owns the model, the engine and the index of stored conversations (``library``). It
  answers one job at a time, in order, and looks at the flag of its job at each chunk of a prompt and at each token.

A client that goes away sets the flag of its job; so does the end of the server, for all jobs. The worker then leaves
the engine in order, which keeps what was read, and closes everything before its thread ends. Nothing else is shared.
"""
