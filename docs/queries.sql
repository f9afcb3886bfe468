-- What was bought most: households and purchases by category
SELECT category, count(DISTINCT user_id) AS households, count(*) AS purchases, round(sum(amount)) AS dollars
FROM events WHERE event_type = 'purchase' GROUP BY category ORDER BY purchases DESC LIMIT 5;

-- The shopping trips of a week: when households shop, and how large the baskets are
SELECT date_format(from_utc_timestamp(start_ts, 'America/New_York'), 'EEEE') AS weekday, count(*) AS trips,
       percentile(bought, 0.5) AS median_items, round(avg(amount), 2) AS mean_dollars
FROM (SELECT *, size(filter(events, e -> e.event_type = 'purchase')) AS bought FROM sessions) WHERE bought > 0
GROUP BY weekday ORDER BY trips DESC;

-- How far back a vector looks: actions read by the model for each household
SELECT CASE WHEN history_length < 64 THEN 'under 64' WHEN history_length < 255 THEN '64 to 254' ELSE '255 (all it reads)' END AS actions,
       count(*) AS households, min(as_of) AS earliest_last_action
FROM current_user_embeddings GROUP BY actions ORDER BY households DESC;

-- What household 1 is likely to take next, of the whole catalogue
SELECT n.rank, i.item_name, i.category, round(n.score, 2) AS score
FROM nearest_items('1', 5) AS n JOIN items AS i USING (item_id) ORDER BY n.rank;

-- The same without what it took in the last four weeks of the log
SELECT i.item_name, i.category, round(n.score, 2) AS score
FROM nearest_items('1', 50) AS n JOIN items AS i USING (item_id)
WHERE n.item_id NOT IN (SELECT item_id FROM events WHERE user_id = '1' AND event_ts >= '2017-12-04')
ORDER BY n.rank LIMIT 5;

-- Who is most like household 1 (cosine of two users' vectors)
SELECT n.rank, n.user_id, round(n.score, 3) AS likeness, count(*) AS sessions
FROM nearest_users('1', 5) AS n JOIN sessions AS s USING (user_id) GROUP BY n.rank, n.user_id, n.score ORDER BY n.rank;

-- What goes with an item: the neighbours of the item that is bought most
SELECT s.item_name AS of_item, n.rank, i.item_name, i.category, round(n.score, 3) AS likeness
FROM current_neighbours AS n JOIN items AS i ON i.item_id = n.neighbour_id
JOIN (SELECT item_id, item_name FROM items ORDER BY target_count DESC, item_id LIMIT 1) AS s ON s.item_id = n.source_id
WHERE n.kind = 'item_item' AND n.rank <= 5 ORDER BY n.rank;

-- Categories near each other: cosine of the mean vectors of their items, as tastes rather than shelves
WITH means AS (
  SELECT i.category, vector_avg(e.vector) AS vector FROM current_item_embeddings AS e JOIN items AS i USING (item_id)
  WHERE i.category IN (SELECT category FROM items GROUP BY category HAVING count(*) >= 200) GROUP BY i.category)
SELECT a.category, b.category AS other, round(vector_cosine_similarity(a.vector, b.vector), 3) AS likeness
FROM means AS a JOIN means AS b ON a.category < b.category ORDER BY likeness DESC LIMIT 5;

-- A lookalike audience: the households nearest to the mean of ten seeds, the seeds left out
WITH seeds AS (SELECT user_id FROM events WHERE event_type = 'purchase' GROUP BY user_id ORDER BY sum(amount) DESC LIMIT 10),
centre AS (SELECT vector_avg(u.vector) AS vector FROM current_user_embeddings AS u JOIN seeds USING (user_id))
SELECT u.user_id, round(vector_cosine_similarity(u.vector, c.vector), 3) AS likeness
FROM current_user_embeddings AS u CROSS JOIN centre AS c LEFT ANTI JOIN seeds ON seeds.user_id = u.user_id
ORDER BY likeness DESC, u.user_id LIMIT 5;

-- Is it worth it: the model beside simpler methods, on the test weeks
SELECT task, method, round(max(value) FILTER (WHERE metric = 'ndcg@10'), 4) AS `ndcg@10`,
       round(max(value) FILTER (WHERE metric = 'recall@20'), 4) AS `recall@20`, max(counted) AS users
FROM current_evaluation WHERE split = 'test' AND slice = 'all' AND task IN ('next', 'new', 'repeat') GROUP BY task, method ORDER BY task, `ndcg@10` DESC;
