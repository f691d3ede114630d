//! The package's Merkle tree, built leaf by leaf: only the roots of whole subtrees are kept, one for each bit of the count.

use sha2::{Digest, Sha256};

/// Leaf: `sha256("leaf:" + event_hash)`; node: `sha256("node:" + left + right)`, all in hex; an odd node is promoted.
#[derive(Default)]
pub(super) struct Merkle {
    /// Subtrees from the left, with their heights, which fall.
    subtrees: Vec<(u32, String)>,
    leaves: u64,
}

impl Merkle {
    pub(super) fn add(&mut self, event_hash: &str) {
        let (mut height, mut right) = (0, hex("leaf:", event_hash, ""));
        while let Some((_, left)) = self.subtrees.pop_if(|(same, _)| *same == height) {
            right = hex("node:", &left, &right);
            height += 1;
        }
        self.subtrees.push((height, right));
        self.leaves += 1;
    }

    pub(super) fn root(&self) -> String {
        let joined = self.subtrees.iter().rev().map(|(_, hash)| hash.clone());
        let root = joined.reduce(|right, left| hex("node:", &left, &right));
        format!("sha256:{}", root.unwrap_or_else(|| hex("", "", "")))
    }

    /// Levels above the leaves.
    pub(super) fn depth(&self) -> u32 {
        self.leaves.max(1).next_power_of_two().ilog2()
    }
}

fn hex(kind: &str, left: &str, right: &str) -> String {
    let hash = Sha256::new().chain_update(kind).chain_update(left).chain_update(right).finalize();
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Level by level, as the reference describes it.
    fn by_levels(hashes: &[String]) -> String {
        let mut level: Vec<_> = hashes.iter().map(|hash| hex("leaf:", hash, "")).collect();
        while level.len() > 1 {
            level = level
                .chunks(2)
                .map(|pair| if let [l, r] = pair { hex("node:", l, r) } else { pair[0].clone() })
                .collect();
        }
        format!("sha256:{}", level[0])
    }

    #[test]
    fn the_root_is_that_of_the_tree_built_level_by_level_for_every_count() {
        let hashes: Vec<String> = (0..70).map(|n| hex("", &n.to_string(), "")).collect();
        let mut tree = Merkle::default();
        let nothing = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!((tree.root().as_str(), tree.depth()), (nothing, 0));
        for count in 1..=hashes.len() {
            tree.add(&hashes[count - 1]);
            assert_eq!(tree.root(), by_levels(&hashes[..count]), "{count}");
            assert_eq!(tree.depth(), (count as f64).log2().ceil() as u32, "{count}");
        }
    }
}
