"""Sessions: contexts that stay on disk under a name.

Three concepts:

* ``Session`` (``session.py``) is the handle that users hold: a model together with one stored context.
* ``SessionStore`` (``store.py``) is one session's folder as a store with commits. ``SessionStore.commit`` writes a new
  state and ``SessionStore.publish`` makes it the committed one.
* The binding (``binding.py``) carries the state of a cache to and from a store.

The other modules, from the bytes upward:

| module | what it holds |
|---|---|
| ``manifest``, ``manifest_json`` | what is committed, as values; these values as text |
| ``committed`` | the manifest file: read, and replaced in one move |
| ``arrays``, ``index``, ``checkpoint`` | named arrays, the index of groups, the contents of one checkpoint, as bytes |
| ``encryption`` | the user's key, and encryption of groups and files |
| ``lock`` | one writer a session, and new sessions that appear whole or not at all |
| ``catalog`` | all sessions of a folder: find, list, remove, prune |
| ``check`` | compare a session with its checksums, repair it, quarantine |
| ``sharing`` | forks and shared prefixes: two sessions over the same files |
| ``quota`` | limits on disk space and on bytes written a day |
| ``transfer`` | export to one file, import from it |

The format on disk is described in docs/file-format.md.
"""
