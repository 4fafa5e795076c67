//! What a confirm leases to its own process, on a real database.

use handfast_scratch::Scratch;

use super::*;
use crate::clock::SystemClock;
use crate::store::postgres::PostgresStore;
use crate::store::{DeliveryView, Written};

struct Pair {
    store: Arc<PostgresStore>,
    rabbit: Arc<RabbitMq>,
    connection: Connection,
    _database: Scratch,
}

impl Pair {
    async fn new() -> Self {
        let database = Scratch::create().await;
        let clock = Arc::new(SystemClock::new());
        let store = PostgresStore::open(database.options(), clock.clone(), 1).await;
        let store = Arc::new(store.unwrap());
        let topology = (*World::new().await.topology.get()).clone();
        store.apply_topology(topology.clone()).await.unwrap();
        let topology = Arc::new(Snapshot::new(topology));
        let rabbit = RabbitMq::new(store.clone(), topology, clock, settings());
        rabbit.connect(&[], DEADLINE).await.unwrap();
        let (sender, _) = mpsc::unbounded_channel();
        rabbit.start(Arc::new(Heard(sender)));
        let pair = Self {
            store,
            rabbit,
            connection: connection().await,
            _database: database,
        };
        eventually("both queues are open", async || {
            let rooms = pair.rabbit.queues.rooms();
            rooms.iter().filter(|(_, room)| *room > 0).count() == 2
        })
        .await;
        pair
    }

    async fn publish(&self, n: u128, permit: &Permit) -> Written {
        let published = self.store.publish(vec![message(n)], permit.handoff());
        published.await.unwrap()
    }

    async fn delivery(&self, n: u128, subscription: &str) -> DeliveryView {
        let shown = self.store.show(id(n), false).await.unwrap().unwrap();
        let mut deliveries = shown.deliveries.into_iter();
        deliveries
            .find(|delivery| delivery.subscription == subscription)
            .unwrap()
    }

    async fn end(self) {
        end(&self.rabbit, &self.connection).await;
        self.store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_confirm_has_leased_is_sent_once_and_without_a_claim() {
    let pair = Pair::new().await;
    for n in 1..=20 {
        let permit = pair.rabbit.permit(1);
        let mut written = pair.publish(n, &permit).await;
        assert_eq!(written.handed.len(), 2, "one for each subscription");
        let handed = std::mem::take(&mut written.handed);
        pair.rabbit.hand_over(permit, handed).await;
    }
    for subscription in ["accounting", "points"] {
        for n in 1..=20 {
            eventually("it is SENT", async || {
                pair.delivery(n, subscription).await.state == DeliveryState::Sent
            })
            .await;
            let delivery = pair.delivery(n, subscription).await;
            assert_eq!(delivery.generation, 1);
            assert_eq!(delivery.attempts, 0);
        }
        let opened = pair.rabbit.looking.ready().await;
        let queue = pair.rabbit.names.queue(subscription);
        let looked = declare::look(&opened, &queue).await.unwrap().unwrap();
        assert_eq!(looked.waiting, 20, "each once");
    }
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_leased_for_a_queue_that_is_not_sent_to() {
    let pair = Pair::new().await;
    let probation = queues::Health::Probation("a test says so".into());
    pair.rabbit.queues.turn("points", |_| true, probation);
    let permit = pair.rabbit.permit(1);
    let written = pair.publish(1, &permit).await;
    let of: Vec<_> = written.handed.iter().map(|one| &one.subscription).collect();
    assert_eq!(of, ["accounting"]);
    drop(permit);
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_sent_any_more_is_given_back() {
    let pair = Pair::new().await;
    // Leased while the queue was open, handed over when it is not, and when the broker ends.
    let early = pair.rabbit.permit(1);
    let late = pair.rabbit.permit(1);
    let first = pair.publish(1, &early).await.handed;
    let second = pair.publish(2, &late).await.handed;
    assert_eq!((first.len(), second.len()), (2, 2));
    let probation = queues::Health::Probation("a test says so".into());
    for name in ["accounting", "points"] {
        pair.rabbit.queues.turn(name, |_| true, probation.clone());
    }
    pair.rabbit.hand_over(early, first).await;
    let is_given_back = async |n| {
        let delivery = pair.delivery(n, "points").await;
        let due = delivery.due_at.unwrap();
        delivery.state == DeliveryState::Pending && due <= pair.store.now()
    };
    eventually("it is due", async || is_given_back(1).await).await;
    pair.rabbit.shutdown().await;
    assert!(!is_given_back(2).await);
    pair.rabbit.hand_over(late, second).await;
    assert!(is_given_back(2).await);
    pair.end().await;
}
