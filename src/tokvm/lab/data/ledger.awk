# Verifies a ledger in one go; prints  last sum count missing bad torn good_bytes
#
# A record is  n boot up w1 … w8 sum.  sum folds the sum of the record before it and all other fields of its own:
# h = (h * 65599 + field) mod 2147483647, exact in awk's doubles (2^31 * 65599 < 2^53). So a record that is torn, altered,
# swapped or from another history does not fit. After a gap or a bad record the chain starts again from what the next
# line says of itself. A last line that does not fit is torn: it was never acknowledged. tokvm/lab/ledger.py says the same.
function accept() { last = $1; sum = $NF; count++; fits = 1; chained = 1 }
BEGIN { chained = 1 }
{
    was_last = last; was_sum = sum; was_bytes = bytes; fits = 0
    bytes += length($0) + 1
    if (NF == 12 && $1 ~ /^[0-9]+$/ && $NF ~ /^[0-9]+$/) {
        h = sum
        for (i = 1; i < NF; i++) h = (h * 65599 + $i) % 2147483647
        if ($1 == last + 1 && (h == $NF || !chained)) accept()
        else if ($1 > last + 1) { missing += $1 - last - 1; accept() }
    }
    if (!fits) { bad++; last = was_last + 1; chained = 0 }
}
END {
    if (NR && !fits) { bad--; torn = 1; last = was_last; sum = was_sum; bytes = was_bytes }
    printf "%d %d %d %d %d %d %d\n", last, sum, count, missing, bad, torn, bytes
}
