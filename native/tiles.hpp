// Who sees whom, a tile at a time: the tiles of keys that a tile of rows visits, and the bits of those seen in part.

// Bit j of word r becomes bit r of word j: Hacker's Delight, section 7-3.
static void transpose(uint64_t words[tile]) {
    uint64_t mask = 0x00000000ffffffffull;
    for (int step = 32; step; step >>= 1, mask ^= mask << step)
        for (int k = 0; k < tile; k = (k + step + 1) & ~step) {
            uint64_t swap = ((words[k] >> step) ^ words[k + step]) & mask;
            words[k] ^= swap << step;
            words[k + step] ^= swap;
        }
}

// How many keys of a tile there are; what lies past a row's length is never read.
static inline int64_t keys_at(const Call& call, int64_t batch, int64_t first_key) {
    const int64_t length = call.lengths ? least(call.lengths[batch], call.keys) : call.keys;
    return most(least(length - first_key, tile), 0);
}

// The tiles of keys that one tile of rows visits, in ascending order: a list of a summary, or from one end to another.
struct Columns {
    const Call* call;
    int64_t at, end;            // entries of the list; without a summary: the columns themselves
    int64_t first_row, rows;    // of the tile
    int64_t low, high, length;  // without a summary: row r sees keys r − low … r + high before `length`

    bool done() const { return at >= end; }
    int64_t column() const { return call->offsets ? call->columns[at] : at; }
    void next() { ++at; }

    // The first column that is not before `wanted`.
    void seek(int64_t wanted) {
        if (!call->offsets) {
            at = most(at, wanted);
            return;
        }
        int64_t above = end;
        while (at < above) {
            const int64_t middle = at + (above - at) / 2;
            if (call->columns[middle] < wanted)
                at = middle + 1;
            else
                above = middle;
        }
    }

    // Whether some pair of the tile is hidden; then bit r of seen[k] says whether row r sees key k.
    bool hides(uint64_t seen[tile]) const {
        if (call->offsets) {
            if (call->partial[at] < 0) return false;
            memcpy(seen, call->bits + call->partial[at] * tile, sizeof(uint64_t) * tile);
            transpose(seen);
            return true;
        }
        const int64_t first = at * tile, last = first + tile - 1, last_row = first_row + rows - 1;
        const bool whole = last < length && (call->left < 0 || first >= last_row - low) &&
                           (call->right < 0 || last <= first_row + high);
        if (whole) return false;
        for (int64_t key = 0; key < tile; ++key) {
            int64_t from = call->right < 0 ? 0 : most(first + key - high - first_row, 0);
            int64_t to = call->left < 0 ? tile : least(first + key + low - first_row + 1, tile);
            if (first + key >= length || from >= to) {
                seen[key] = 0;
                continue;
            }
            const uint64_t until = to == tile ? ~0ull : (1ull << to) - 1;
            seen[key] = until & ~((1ull << from) - 1);
        }
        return true;
    }
};

static Columns columns_of(const Call& call, int64_t batch, int64_t head, int64_t tile_row) {
    Columns found{};
    found.call = &call;
    found.first_row = tile_row * tile;
    found.rows = least(call.queries - found.first_row, tile);
    if (call.offsets) {
        const int64_t b = call.tile_batch > 1 ? batch : 0, h = call.tile_heads > 1 ? head : 0;
        const int64_t* place = call.offsets + (b * call.tile_heads + h) * (tiles_of(call.queries) + 1) + tile_row;
        found.at = place[0], found.end = place[1];
        return found;
    }
    const int64_t start = start_of(call, batch);
    found.length = call.lengths ? least(call.lengths[batch], call.keys) : call.keys;
    found.low = call.left - start, found.high = call.right + start;
    const int64_t first = call.left < 0 ? 0 : most(found.first_row - found.low, 0);
    const int64_t end = call.right < 0 ? found.length : least(found.length, found.first_row + found.rows + found.high);
    found.at = first / tile, found.end = first < end ? tiles_of(end) : found.at;
    return found;
}

// The tiles of rows of a band, and the next column that any of them visits.
constexpr int band_rows = 16;

struct BandColumns {
    Columns of[band_rows];
    int64_t count;

    BandColumns(const Call& call, const Band& band) : count(band.count) {
        for (int64_t r = 0; r < count; ++r) of[r] = columns_of(call, band.batch, band.head, band.first + r);
    }
    int64_t next() const {  // −1 at the end
        int64_t column = INT64_MAX;
        for (int64_t r = 0; r < count; ++r)
            if (!of[r].done()) column = least(column, of[r].column());
        return column == INT64_MAX ? -1 : column;
    }
};
