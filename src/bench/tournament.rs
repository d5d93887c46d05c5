//! Who meets whom in which round, so that all pairs meet and nobody meets two at once (the circle method).

/// How many rounds it takes.
pub(super) fn rounds(ranks: u32) -> u32 {
    seats(ranks) - 1
}

/// Whom a rank meets in a round; `None` where it sits out.
pub(super) fn opponent(rank: u32, round: u32, ranks: u32) -> Option<u32> {
    // The last seat stays; the others meet where their numbers add up to twice the round's.
    let circle = seats(ranks) - 1;
    let opponent = match rank {
        last if last == circle => round,
        _ => match (2 * round + circle - rank) % circle {
            same if same == rank => circle,
            other => other,
        },
    };
    (opponent < ranks).then_some(opponent)
}

/// Ranks, and one nobody where they are odd.
fn seats(ranks: u32) -> u32 {
    ranks.next_multiple_of(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pairs_meet_once_and_nobody_meets_two() {
        for ranks in 2..20 {
            let mut met = vec![0; (ranks * ranks) as usize];
            for (round, rank) in
                (0..rounds(ranks)).flat_map(|round| (0..ranks).map(move |rank| (round, rank)))
            {
                let Some(other) = opponent(rank, round, ranks) else { continue };
                assert_eq!(opponent(other, round, ranks), Some(rank), "{ranks} ranks, round {round}");
                met[(rank * ranks + other) as usize] += 1;
            }
            for (rank, other) in (0..ranks).flat_map(|rank| (0..ranks).map(move |other| (rank, other))) {
                assert_eq!(
                    met[(rank * ranks + other) as usize],
                    u32::from(rank != other),
                    "{rank} and {other}"
                );
            }
        }
    }
}
