//! What the kernels keep in memory while they run.

/// Blocks whose tweaks are shifts of one.
pub(super) const SHIFTS: usize = 64;
/// Blocks whose tweaks are kept: as many as a unit has, so that those of 128 blocks before are there.
const BLOCKS: usize = 256;
/// The most data units that are worked on at a time.
pub(super) const UNITS: usize = 128;

/// What the code keeps in memory while it runs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in super::super) struct Scratch {
    /// V of a unit's blocks. Those of the next unit take the places of blocks that are done.
    pub(super) v: [u128; BLOCKS],
    /// T₀ of each unit, and room for one that the code looks at after the last.
    pub(super) tweaks: [u128; UNITS + 1],
    /// Units that are left.
    pub(super) count: u64,
    /// The last offset in use in `v`: two units of 512 bytes fit, since one group is made while another is used.
    pub(super) last: u64,
    /// Groups in the first 64 blocks of a unit, and in the next 64: those whose tweaks come from one.
    pub(super) shifted: u64,
    /// Whether there are such next 64.
    pub(super) again: u64,
    /// Groups in the rest of a unit.
    pub(super) summed: u64,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            v: [0; BLOCKS],
            tweaks: [0; UNITS + 1],
            count: 0,
            last: 0,
            shifted: 0,
            again: 0,
            summed: 0,
        }
    }
}

impl Scratch {
    /// To be called before units of `size` bytes, in groups of `group` bytes.
    pub(super) fn prepare(&mut self, size: usize, group: usize) {
        const SHIFTED: usize = 16 * SHIFTS;
        let (last, shifted, again, summed) = match size {
            512 => (SHIFTED - 1, 512, 0, 0),
            4096 => (4096 - 1, SHIFTED, 1, 4096 - 2 * SHIFTED),
            _ => panic!("data units of {size} bytes; there are those of 512 and of 4096"),
        };
        self.last = last as u64;
        self.shifted = (shifted / group) as u64;
        self.again = again;
        self.summed = (summed / group) as u64;
    }
}
