# Runs its arguments with the interpreter that runs the cluster's Ray. The parent process is Ray's and maps Ray's library,
# which lies in that interpreter's site-packages; a head started from a virtual environment that nobody activated has
# another `python`, or none, on its PATH.
prefix=$(sed -n 's#^[^/]*\(/.*\)/lib/python[^/]*/site-packages/ray/_raylet.so$#\1#p' /proc/$PPID/maps | head -n 1)
python="$prefix/bin/python"
[ -x "$python" ] || python=python
exec "$python" "$@"
