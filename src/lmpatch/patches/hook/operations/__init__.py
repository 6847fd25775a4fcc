"""Operations of hook patches: each file has ``OPERATION``, a class of the file's name; see ``hook.operation``."""
